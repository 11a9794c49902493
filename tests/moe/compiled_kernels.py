"""Compiles the kernels for GPUs that are not here, and prints what the compiler made of each, as JSON.

Run as a program: in the tests' own process Triton interprets.
"""

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from routerzoo.moe import kernels
from routerzoo.moe.kernel_calls import tile_sizes

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
D, H, E = 2048, 1024, 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cases():
    """Yield the kernel, the types of its arguments, its constants and sizes, of each case."""
    for dtype, rows in (("bf16", 4096), ("bf16", 64), ("bf16", 8), ("fp16", 4096), ("fp32", 4096)):
        values, index = f"*{dtype}", "*i32"
        sizes = tile_sizes(DTYPES[dtype], rows)
        products = {
            "up": {"IN": D, "OUT": 2 * H, "STRIDE_O": D, "STRIDE_I": 1, "GATHERED": True},
            "dx": {"IN": 2 * H, "OUT": D, "STRIDE_O": 1, "STRIDE_I": D, "GATHERED": False},
        }
        types = {"x_ptr": values, "weight_ptr": values, "source_ptr": index, "ends_ptr": index, "y_ptr": values}
        for name, shape in products.items():
            constants = {"E": E, "E2": E, "PRECISION": "ieee", "COLUMNS": 8, **shape}
            yield f"product {name} {dtype} {rows}", kernels.product, types, {**constants, **sizes}
        if rows != 4096:
            continue
        sizes = tile_sizes(DTYPES[dtype], 128)
        sizes["BO"], sizes["BI"] = sizes.pop("BM"), sizes.pop("BN")
        types = {"g_ptr": values, "x_ptr": values, "source_ptr": index, "ends_ptr": index}
        for gathered in (True, False):
            types["grad_ptr"] = values if gathered else "*fp32"  # float32 under autocast
            shape = {"OUT": D, "IN": H, "GATHERED_G": gathered, "GATHERED_X": not gathered, "PRECISION": "ieee"}
            yield f"weight_grad {gathered} {dtype}", kernels.weight_grad, types, {**shape, **sizes}
        pointers = dict.fromkeys(("z_ptr", "bias_ptr", "a_ptr", "da_ptr", "weight_ptr", "bias_part_ptr"), values)
        pointers |= dict.fromkeys(("dz_ptr", "wa_ptr", "dweight_ptr", "y_ptr", "out_ptr", "g_ptr"), values)
        pointers |= dict.fromkeys(("order_ptr", "source_ptr", "row_ptr", "begin_ptr", "ends_ptr"), index)
        pointers |= {"sums_ptr": values, "expert_ptr": "*i16", "seed_ptr": "*i64", "dropout": "fp32", "top_k": "i32"}
        hidden = {"E": E, "H": H, "Z": 2 * H, "BIAS": True, "DROPOUT": True, "BH": 1024, "num_warps": 8}
        for activation in ("silu", "gelu"):
            yield f"activate {activation} {dtype}", kernels.activate, pointers, {**hidden, "ACTIVATION": activation}
            constants = {**hidden, "ACTIVATION": activation, "DOWN_BIAS": True}
            yield f"activate_backward {activation} {dtype}", kernels.activate_backward, pointers, constants
        for top_k, ragged in ((8, False), (0, True)):
            constants = {"E": E, "D": D, "TOP_K": top_k, "RAGGED": ragged, "BIAS": True, "WEIGHTED": True, "BD": 1024}
            yield f"combine {top_k} {dtype}", kernels.combine, pointers, {**constants, "num_warps": 8}
        constants = {"E": E, "E2": E, "Z": 2 * H, "D": D, "CHUNK": 1024, "BR": 64, "BC": 64, "num_warps": 4}
        types = {**pointers, "grad_ptr": values, "parts_ptr": "*fp32", "up_ptr": "*fp32", "down_ptr": values}
        yield f"column_sums {dtype}", kernels.column_sums, types, constants
        yield f"sum_chunks {dtype}", kernels.sum_chunks, types, constants
    types = dict.fromkeys(("begin_ptr", "ends_ptr", "narrow_ptr", "source_ptr", "row_ptr"), "*i32")
    types |= dict.fromkeys(("num_rows", "num_tokens", "top_k", "row_step", "token_step"), "i32")
    for ragged, narrow in ((True, True), (False, False)):
        types = {**types, "expert_ptr": "*i16", "order_ptr": "*i64" if narrow else "*i32"}
        constants = {"E": E, "NARROW": narrow, "RAGGED": ragged, "B": 256, "num_warps": 4}
        yield f"place_rows {ragged}", kernels.place_rows, types, constants
    floats = ("logits_ptr", "log_partition_ptr", "sums_ptr", "balance_ptr", "z_ptr", "grad_balance_ptr", "grad_z_ptr")
    types = {**dict.fromkeys((*floats, "grad_ptr", "parts_ptr"), "*fp32"), "experts_ptr": "*i64", "padding_ptr": "*i1"}
    types |= {"num_tokens": "i32", "top_k": "i32", "num_parts": "i32"}
    yield "softmax_losses", kernels.softmax_losses, types, {"E": E, "E2": E, "BP": 64, "num_warps": 8}
    for number in ({}, {"num_tokens": 1, "top_k": 1}):  # an argument of 1 is a constant to Triton
        sizes = {"E": E, "E2": E, **number}
        name = "one token" if number else "tokens"
        yield f"softmax_sums {name}", kernels.softmax_sums, types, {**sizes, "PADDED": True, "BT": 64}
        constants = {**sizes, "PADDED": True, "BT": 64, "BALANCE": True, "Z_LOSS": True}
        yield f"softmax_losses_backward {name}", kernels.softmax_losses_backward, types, constants


def compiled(kernel, types, constants, architecture):
    """Return registers, bytes of stack and numbers of tensor-core instructions."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if str(signature[name]).startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "registers": registers,
        "stack": stack,
        "shared": binary.metadata.shared,
        "HMMA": len(re.findall(r"\bHMMA", code)),
        "HGMMA": len(re.findall(r"\bHGMMA", code)),
    }


def _run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    found = {
        f"{name} sm_{architecture}": compiled(kernel, types, constants, architecture)
        for (name, kernel, types, constants), architecture in itertools.product(cases(), (80, 90))
    }
    print(json.dumps(found))
