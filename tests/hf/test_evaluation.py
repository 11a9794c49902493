"""lm-evaluation-harness on a local task, without a hub."""

import json

import pytest
import torch

from routerzoo.errors import UserError
from tests.hf.models import build

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
hf = pytest.importorskip("routerzoo.hf")

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
    ),
]
QUESTIONS = [
    {"question": f"w{3 + i} w{9 + i}", "choices": [f" w{20 + i}", f" w{30 + i}"], "answer": i % 2} for i in range(8)
]
TASK = """task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_choices.yaml").write_text(TASK.format(data=data))
    return tmp_path / "tasks"


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 40)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@torch.no_grad()
def accuracy(model):
    encode = tokenizer()
    right = 0
    for question in QUESTIONS:
        ids = torch.tensor([encode(question["question"]).input_ids])
        after = model(input_ids=ids).logits[0, -1]
        scores = [float(after[encode(choice).input_ids[0]]) for choice in question["choices"]]
        right += int(scores[1] > scores[0]) == question["answer"]
    return right / len(QUESTIONS)


def test_our_model_and_the_exported_one_are_evaluated_alike(tasks, tmp_path):
    model = hf.replace_routers(build("Mixtral"))
    expected = accuracy(model)
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text('{"fit": {"bpb": 1.0}}')
    numbers = hf.evaluate(model, tokenizer(), ["local_choices"], include_path=tasks, run=run, batch_size=4)
    assert numbers["local_choices"]["acc,none"] == expected
    written = json.loads((run / "results.json").read_text())
    assert written["lm_eval"]["local_choices"]["acc,none"] == expected
    assert written["fit"] == {"bpb": 1.0}
    hf.to_transformers(model).save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert hf.evaluate(plain, tokenizer(), ["local_choices"], include_path=tasks) == numbers
    # As its command line does.
    tokenizer().save_pretrained(tmp_path / "plain")
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={tmp_path / 'plain'},dtype=float32",
        tasks=["local_choices"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
    )
    assert found["results"]["local_choices"]["acc,none"] == expected


def test_what_cannot_be_evaluated_is_said(tmp_path):
    with pytest.raises(UserError, match="lm-eval knows no task 'mine': name the folder"):
        hf.evaluate(build("Mixtral"), tokenizer(), ["mine"])
    with pytest.raises(UserError, match=r"results.json does not exist"):
        hf.evaluate(build("Mixtral"), tokenizer(), ["mine"], run=tmp_path)
