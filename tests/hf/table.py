"""The table of architectures in docs/hf.md, from the outcomes of the tests: `python -m tests.hf.table`."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest

COLUMNS = {
    "in": "test_the_output_stays_and_routers_decide_it",
    "generate": "test_generation_with_a_cache_and_left_padding_is_that_without",
    "save, load": "test_a_saved_model_is_loaded_by_the_auto_classes",
    "bfloat16": "test_sixteen_bits_leave_routers_in_float32",
    "checkpointing": "test_gradient_checkpointing_gives_the_same_gradients",
    "PEFT": "test_adapters_train_merge_and_load",
    "out": "test_a_model_goes_out_as_a_plain_one",
}
SPECIAL = {
    "Gemma 4": "the gate sees other hidden states than the experts; a scale for each expert's output",
    "DeepSeek-V4": "hash layers; clamped SwiGLU; no LoRA on the gate of hash layers",
    "Llama 4": "weights on the input; weights stored transposed",
    "gpt-oss": "a gate with bias; clamped, interleaved SwiGLU with biases",
    "Phi-3.5-MoE": "SparseMixer",
    "Qwen2-MoE": "a gated shared expert",
    "Qwen3-Next": "a gated shared expert",
    "DeepSeek-V3": "sigmoid, groups, selection bias",
    "GLM-4.5": "as DeepSeek-V3",
    "dots.llm1": "as DeepSeek-V3",
    "Llama": "out as Mixtral",
    "Mistral": "out as Mixtral",
    "Qwen3": "out as Qwen3-MoE",
    "OLMo 2": "out as FlexOlmo",
}


class Outcomes:
    """Collects which tests passed, by function and architecture."""

    def __init__(self):
        self.passed = defaultdict(dict)

    def pytest_runtest_logreport(self, report):
        function, _, name = report.nodeid.partition("::")[2].partition("[")
        if report.when == "call" or report.failed:
            self.passed[function][name.removesuffix("]")] = report.passed


def table(passed):
    from tests.hf.models import DENSE, RELEASED  # not before pytest has set itself up

    rows = [f"| architecture | {' | '.join(COLUMNS)} | |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    words = {True: "yes", False: "FAILS", None: "-"}
    for name in (*DENSE, *RELEASED):
        cells = [words[passed[function].get(name)] for function in COLUMNS.values()]
        rows.append(f"| {name} | {' | '.join(cells)} | {SPECIAL.get(name, '')} |")
    return "\n".join(rows)


if __name__ == "__main__":
    outcomes = Outcomes()
    folder = Path(__file__).parent
    code = pytest.main(["-q", "-n", "0", "-m", "full or not full", str(folder / "test_architectures.py")], [outcomes])
    page = folder.parents[1] / "docs" / "hf.md"
    head, _, rest = page.read_text().partition("<!-- table -->\n")
    _, _, tail = rest.partition("<!-- end of table -->")
    page.write_text(f"{head}<!-- table -->\n{table(outcomes.passed)}\n<!-- end of table -->{tail}")
    sys.exit(code)
