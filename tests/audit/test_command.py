"""`python -m routerzoo audit` on runs and on folders of transformers: exit codes, files, errors."""

import json

import pytest
import torch
from PIL import Image

from routerzoo.__main__ import main
from routerzoo.data import ImageData
from routerzoo.data.images import ImageBatch

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
    assert code_of(last, "--tokenizer", "bytes", cpu) == 2
    assert "--tokenizer is for models of transformers" in capsys.readouterr().err
    (tmp_path / "limits.yaml").write_text("max_parameter_norm: null\nmax_output_norm: null\n")
    assert code_of(last, "--thresholds", "limits.yaml", "--counterfactuals", 0, cpu) == 0
    assert code_of(last, "--thresholds", "limits.yaml", "--max-parameter-norm", 3, "--counterfactuals", 0, cpu) == 1
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
    assert len(result["group_names"]) == 10


def test_vision_models_of_transformers_are_audited(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from routerzoo import hf

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=28, patch_size=7, num_labels=10)
    dense = transformers.ViTForImageClassification(config).eval()
    images = ImageData("fashion-mini")
    images_BCHW = next(iter(images.test_dataloader())).images_BCHW[:4].expand(-1, 3, -1, -1)
    logits_BL = dense(images_BCHW).logits
    labels_B = torch.tensor(images.split("test").labels[:4])
    hf.upcycle(dense, num_experts=4).save_pretrained("vit")
    given = ["--data", "fashion-mini", "--device", "cpu", "--max-load", 9]
    assert code_of("vit", *given, "--out", "one", "--batches", 25, "--batch-size", 40, "--best", 1) == 0
    whole = json.loads((tmp_path / "one" / "audit.json").read_text())
    assert whole["tokens"] == 1000 * 17  # all images, 16 patches and a class token of each
    assert set(whole["layers"][0]["specialization"]) == {"class"}
    assert whole["layers"][0]["best"]["tokens"] == 40
    # Experts are equal, and their weights sum to 1.
    assert whole["layers"][0]["costs"]["random"] == pytest.approx(0, abs=1e-6)
    from routerzoo.audit import audit
    from routerzoo.audit.released import load
    from routerzoo.audit.released_images import subject_of_images

    subject = subject_of_images(load(tmp_path / "vit"), "fashion-mini", name="vit", folder=tmp_path / "vit")
    subject.batches = [ImageBatch(images_BCHW, labels_B)]
    expected = torch.nn.functional.cross_entropy(logits_BL, labels_B)
    assert audit(subject).loss == pytest.approx(float(expected.detach()), rel=1e-5)

    for name in ("ant", "bee"):
        (tmp_path / "insects" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 30), (80 * number, 9, 9)).save(tmp_path / "insects" / name / f"{number}.png")
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained("vit")
    assert code_of("vit", "--data", "insects", "--out", "two", "--device", "cpu", "--min-load", "none") == 0
    result = json.loads((tmp_path / "two" / "audit.json").read_text())
    assert result["group_names"] == ["ant", "bee"]
    assert "loss and counterfactuals: the 2 classes of insects are not the model's 10" in result["left_out"]
    subject = subject_of_images(load(tmp_path / "vit"), "insects", name="vit", folder=tmp_path / "vit")
    # Normalized by the processor's 0.5 and 0.5.
    assert subject.batches[0].images_BCHW[1, 0, 0, 0] == pytest.approx((80 / 255 - 0.5) / 0.5, abs=1e-4)
    capsys.readouterr()
    assert code_of("vit", "--data", "nothing", "--device", "cpu") == 2
    assert "no data set or folder is called 'nothing'" in capsys.readouterr().err
    assert code_of("vit", "--data", "insects", "--device", "cpu", "--length", 8) == 2
    assert "--length is for text, and vit takes images" in capsys.readouterr().err


def test_files_that_are_broken_or_lack_weights_are_refused(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained("mixtral")
    path = tmp_path / "mixtral" / "model.safetensors"
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--data", "text.txt", "--tokenizer", "bytes", "--device", "cpu"]
    weights = {k: v for k, v in load_file(path).items() if "layers.1" not in k or "experts" not in k}
    save_file(weights, path, metadata={"format": "pt"})
    for told in ("mixtral lacks 2 of the weights of a MixtralForCausalLM", "model.safetensors is damaged"):
        assert code_of("mixtral", *given) == 2
        assert told in capsys.readouterr().err
        path.write_bytes(path.read_bytes()[:1000])


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
        (["mixtral"], "mixtral comes with no text or images: give --data"),
        (["mixtral", "--data", "none.txt", *given[2:]], "no data set or file is called 'none.txt'; the data sets are"),
        (["mixtral", *given[:2]], "mixtral has no tokenizer: give --tokenizer a name, a path or bytes"),
        (["mixtral", *given, "--trainer.devices=1"], "there is no option --trainer.devices"),
        (["mixtral", *given, "--prune", 4], "num_experts must be at least k = 2 and below the 4 of MoE layer 0, got 4"),
        (["mixtral", *given, "--earlier", "none"], "the earlier checkpoint none does not exist"),
        (["mixtral", *given, "--max-load", "abc"], "a number or none is needed, got 'abc'"),
    ):
        assert code_of(*args) == 2
        assert told in capsys.readouterr().err
