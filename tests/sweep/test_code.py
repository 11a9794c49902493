import pytest

from routerzoo.sweep.code import OtherCodeError, code_version, expect_code


def test_runs_are_made_by_the_code_that_they_are_said_to_be_made_by():
    own = code_version()
    expect_code(own)
    expect_code(f"{own}+0123abcd")  # with sources that are not part of routerzoo
    for other in ("0.1+0123abcd", own[:-1], f"{own}0"):
        with pytest.raises(OtherCodeError, match="has other code"):
            expect_code(other)
