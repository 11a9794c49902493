"""A task refuses data whose token ids mean something else than those that it was trained with."""

import pytest
from lightning import Trainer

from routerzoo import LanguageModeling, TextData
from routerzoo.data.tokenizer import train_bpe
from routerzoo.errors import UserError

pytest.importorskip("tokenizers")
SIZES = {"vocab_size": 260, "max_length": 8, "d_model": 8, "num_blocks": 1, "num_heads": 1, "num_experts": 2}


def trainer():
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", max_steps=1, limit_val_batches=1, limit_test_batches=1, **quiet)


@pytest.fixture
def data(tmp_path):
    for name, text in (("one", "the quick brown fox "), ("other", "lorem ipsum dolor sit ")):
        train_bpe([text * 9], 260, tmp_path / f"{name}.json")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox and lorem ipsum " * 100)

    def build(tokenizer):
        if tokenizer != "bytes":
            tokenizer = str(tmp_path / f"{tokenizer}.json")
        return TextData(str(text), tokenizer=tokenizer, root=str(tmp_path), sequence_length=8, batch_size=2)

    return build


@pytest.mark.parametrize("trained", ["one", "bytes"])
def test_another_tokenizer_of_a_size_that_fits_is_refused(trained, data, tmp_path):
    fitted = trainer()
    fitted.fit(LanguageModeling(**SIZES), data(trained))
    path = tmp_path / "last.ckpt"
    fitted.save_checkpoint(path)
    loaded = LanguageModeling.load_from_checkpoint(path)
    trainer().test(loaded, data(trained), verbose=False)
    told = f"trained with another tokenizer than {data('other').tokenizer}"
    with pytest.raises(UserError, match=told):
        trainer().test(loaded, data("other"))
    with pytest.raises(UserError, match=told):
        trainer().test(LanguageModeling(**SIZES), data("other"), ckpt_path=path)
    with pytest.raises(UserError, match=told):
        trainer().fit(LanguageModeling(**SIZES), data("other"), ckpt_path=path)
