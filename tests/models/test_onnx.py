"""Export of trained classifiers to ONNX."""

import pytest
import timm
import torch

from routerzoo import sparsify

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of the exporter's own
@pytest.mark.parametrize(("router", "shared"), [("LinearRouter", 1), ("XMoERouter", 0), ("HyperRouter", 0)])
def test_a_classifier_gives_the_same_in_onnxruntime_for_any_batch(router, shared, tmp_path):
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    model = sparsify(model, num_experts=4, router=router, num_shared_experts=shared).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (torch.randn(3, 3, 28, 28),)
    program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in (1, 7):
        images = torch.randn(size, 3, 28, 28)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-4, atol=1e-5)
