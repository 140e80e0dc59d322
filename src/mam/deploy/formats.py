"""Programs in the formats of their runtimes: StableHLO for JAX, ONNX for ONNX Runtime."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from mam.deploy.program import Program
from mam.errors import needs_extra
from mam.kernels.native.library import portable

PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(program: Program, folder: Path) -> dict[str, Any]:
    """Write a program for any batch and platform; return what its card says of it.

    Raises:
        UserError: where the package that writes it is not installed.
    """
    structs = _structs(program)
    with portable():
        exported = export.export(jax.jit(lambda *arrays: program(*arrays)), platforms=PLATFORMS)(
            *structs
        )
    with needs_extra("export to StableHLO", "flatbuffers", "export"):
        data = exported.serialize()
    (folder / "policy.stablehlo").write_bytes(data)
    version = exported.calling_convention_version
    return {
        "program": "policy.stablehlo",
        "platforms": list(PLATFORMS),
        "runtime": f"jax {jax.__version__} and, as jax.export promises, six months of later ones",
        "calling_convention": version,
    }


def write_onnx(program: Program, folder: Path) -> dict[str, Any]:
    """Write a program for any batch; return what its card says of it.

    Raises:
        UserError: where the package that writes it is not installed, or for an operation that has
            no form in ONNX.
    """
    with needs_extra("export to ONNX", "onnx", "export"):
        import onnx
        from onnx import helper
    from mam.deploy.onnx_graph import IR_VERSION, OPSET, Graph, Value, convert
    from mam.deploy.onnx_ops import cast, tensor_info

    structs = _structs(program)
    with portable(loops=False):
        closed = jax.jit(lambda *arrays: program(*arrays)).trace(*structs).jaxpr
    named = zip(program.inputs, structs, strict=True)
    inputs = [Value(s.shape, np.dtype(s.dtype), port.name) for port, s in named]
    graph = Graph(batch="batch")
    graph.nodes.append(helper.make_node("Shape", [inputs[0].name], ["batch"], start=0, end=1))
    arguments = zip(inputs, closed.in_avals, strict=True)
    traced = [cast(graph, value, aval.dtype) for value, aval in arguments]  # JAX narrows 64 bits
    results = convert(graph, closed.jaxpr, closed.consts, traced)
    outputs = [
        Value(value.shape, value.dtype, _out(port.name, program))
        for value, port in zip(results, program.outputs, strict=True)
    ]
    for value, output in zip(results, outputs, strict=True):
        names = [graph.name_of(value)], [output.name]
        graph.nodes.append(helper.make_node("Identity", *names))
    infos = [[tensor_info(v) for v in values] for values in (inputs, outputs)]
    made = helper.make_graph(graph.nodes, "policy", *infos, initializer=graph.initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    (folder / "policy.onnx").write_bytes(model.SerializeToString())
    return {"program": "policy.onnx", "runtime": f"ONNX opset {OPSET}, IR {IR_VERSION}"}


def _out(name: str, program: Program) -> str:
    """Return the name of an output, which no input may have."""
    return f"next_{name}" if name in {port.name for port in program.inputs} else name


def _structs(program: Program) -> list[jax.ShapeDtypeStruct]:
    (batch,) = export.symbolic_shape("B")
    return [port.struct(batch) for port in program.inputs]


WRITERS = {"stablehlo": write_stablehlo, "onnx": write_onnx}
