"""`python -m routerzoo audit` on runs and on folders of transformers: exit codes, files, errors."""

import json

import pytest
import torch

from routerzoo.__main__ import main

pytestmark = pytest.mark.full

TEXT = "It was the best of times, it was the worst of times. " * 40
MODEL = ["--model.d_model=16", "--model.num_blocks=2", "--model.num_heads=2", "--model.num_experts=4"]
QUICK = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
QUICK += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def code_of(*args):
    try:
        main(["audit", *map(str, args)])
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_run_is_healthy_until_something_is_planted(tmp_path, capsys):
    data = ["--data=TextData", "--data.sequence_length=16", "--data.batch_size=4"]
    main(["fit", "--model=LanguageModeling", *MODEL, *data, *QUICK, "--run_dir=run"])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = (tmp_path / "run" / "results.json").read_text()
    cpu = "--trainer.accelerator=cpu"
    assert code_of("run", "--best", 1, "--earlier", last, cpu) == 0
    assert (tmp_path / "run" / "results.json").read_text() == before
    result = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert result["healthy"]
    assert result["layers"][0]["saturation"][str(last)]["saturation"] == 1
    assert set(result["layers"][0]["costs"]) == {"drop", "next", "random"}
    assert result["layers"][0]["best"]["tokens"] == 4
    assert (tmp_path / "run" / "audit.html").read_text().startswith("<!doctype html>")
    saved = torch.load(last)
    saved["state_dict"]["net.blocks.1.feed_forward.experts.down"][2] *= 50
    torch.save(saved, last)
    capsys.readouterr()
    assert code_of(last, "--counterfactuals", 0, "--out", "other", cpu) == 1
    assert "MoE layer 1, expert 2: parameter norm exploding" in capsys.readouterr().out
    (tmp_path / "other.txt").write_text(TEXT)
    assert code_of(last, "--data", "other.txt", "--max-parameter-norm", "none", "--max-output-norm", "none", cpu) == 0
    saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if "head" not in k and "embedding" not in k}
    torch.save(saved, last)
    assert code_of(last, cpu) == 2
    assert "does not fit the model" in capsys.readouterr().err


def test_images_are_audited_by_class(tmp_path):
    backbone = {"patch_size": 14, "embed_dim": 12, "depth": 2, "num_heads": 2}
    model = ["--model=ImageClassification", "--model.num_experts=4", f"--model.backbone_arguments={backbone}"]
    main(["fit", *model, "--data=ImageData", "--data.batch_size=32", *QUICK, "--run_dir=run"])
    assert code_of("run", "--best", 1, "--batches", 4, "--trainer.accelerator=cpu") in (0, 1)
    result = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert set(result["layers"][0]["specialization"]) == {"class"}
    assert result["layers"][0]["best"]["tokens"] == 32
    assert len(result["class"]) == 10


def test_models_of_transformers_are_audited(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from routerzoo import hf

    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))
    model.save_pretrained("mixtral")
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 3)
    given = ["--data", "text.jsonl", "--tokenizer", "bytes", "--device", "cpu"]
    assert code_of("mixtral", *given, "--out", "one", "--best", 1, "--earlier", "mixtral", "--max-load", 9) == 0
    result = json.loads((tmp_path / "one" / "audit.json").read_text())
    assert result["layers"][0]["name"] == "model.layers.0.mlp.experts.moe"
    assert set(result["layers"][0]["specialization"]) == {"token", "document"}
    # The loss is the plain model's.
    ids = torch.tensor([list(TEXT.encode()[:64])])
    assert result["loss"] == pytest.approx(float(model(input_ids=ids, labels=ids).loss.detach()), rel=0.1)
    assert code_of("mixtral", *given, "--out", "two", "--prune", 3, "--save", "pruned", "--max-load", 9) == 0
    assert "3 experts left in each layer" in capsys.readouterr().out
    cut = json.loads((tmp_path / "two" / "audit.json").read_text())["compression"]
    assert cut["loss_before"] == pytest.approx(result["loss"])
    assert code_of("pruned", *given, "--out", "three", "--max-load", 9) == 0
    assert json.loads((tmp_path / "three" / "audit.json").read_text())["loss"] == pytest.approx(cut["loss_after"])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] *= 100
    model.save_pretrained("broken")
    assert code_of("broken", *given, "--max-load", 9) == 1
    assert "MoE layer 1, expert 3: parameter norm exploding" in capsys.readouterr().out
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    dense.save_pretrained("dense")
    assert code_of("dense", *given) == 2
    assert "there is no routing to audit in dense: no gate of LlamaForCausalLM is known" in capsys.readouterr().err
    hf.upcycle(dense, num_experts=4).save_pretrained("upcycled")
    assert code_of("upcycled", *given, "--max-load", 9) in (0, 1)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing-of-the-kind"}')
    for args, told in (
        (["odd", *given], "odd is no model that transformers knows"),
        (["mixtral"], "mixtral comes with no text: give --data"),
        (["mixtral", "--data", "none.txt"], "the text none.txt does not exist"),
        (["mixtral", *given[:2]], "mixtral has no tokenizer: give --tokenizer a name, a path or bytes"),
        (["mixtral", *given, "--trainer.devices=1"], "there is no option --trainer.devices"),
    ):
        assert code_of(*args) == 2
        assert told in capsys.readouterr().err
