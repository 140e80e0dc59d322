"""A traced program (jaxpr) as an ONNX graph.

Constants are computed while the graph is built. A broadcast is not carried out: ONNX's elementwise
operators do it themselves, so a value is kept as small as it was, and expanded only where something
else reads it. The one symbolic size that a program may have is its batch B, a factor of an axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex
from jax.interpreters import partial_eval

from mam.errors import UserError

OPSET = 20  # the first with Gelu
IR_VERSION = 9

Size = Any  # of an axis: an int, or a symbolic multiple of B


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its name, or its numbers if they are known."""

    shape: tuple[Size, ...]  # as it is stored: 1 where it is broadcast along an axis
    dtype: np.dtype
    name: str = ""
    array: np.ndarray | None = None

    @classmethod
    def of(cls, array: Any) -> "Value":
        """Return a constant."""
        array = np.asarray(array)
        return cls(array.shape, array.dtype, array=array)


@dataclass
class Graph:
    """A graph that is built: of the model, or the body of a loop, which reads the outer ones."""

    batch: str  # the name of a tensor [1] with the size B
    counter: list[int] = field(default_factory=lambda: [0])  # shared with bodies
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    known: dict[int, tuple[np.ndarray, str]] = field(default_factory=dict)

    def body(self) -> "Graph":
        """Return the graph of a body within this one."""
        return Graph(self.batch, self.counter)

    def fresh(self, stem: str) -> str:
        """Return a name that is not in use."""
        self.counter[0] += 1
        return f"{stem}_{self.counter[0]}"

    def name_of(self, value: Value) -> str:
        """Return the name of a value; a constant is stored."""
        if value.array is None:
            return value.name
        return self.constant(value.array)

    def constant(self, array: Any) -> str:
        """Store numbers, once, and return their name."""
        from onnx import numpy_helper

        array = np.asarray(array)
        if id(array) not in self.known:
            name = self.fresh("c")
            self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
            self.known[id(array)] = (array, name)  # kept, so that no other gets its id
        return self.known[id(array)][1]

    def add(self, op: str, *inputs: Value | str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Add a node and return the names of its outputs."""
        from onnx import helper

        names = [v if isinstance(v, str) else self.name_of(v) for v in inputs]
        out = [self.fresh(op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, names, out, **attributes))
        return out

    def node(
        self,
        op: str,
        *inputs: Value | str,
        shape: Sequence[Size],
        dtype: Any,
        **attributes: Any,
    ) -> Value:
        """Add a node with one output and return it.

        Args:
            op: operator of ONNX.
            *inputs: values, or names of tensors.
            shape: of the output.
            dtype: of the output.
            **attributes: of the operator.
        """
        return Value(tuple(shape), np.dtype(dtype), self.add(op, *inputs, **attributes)[0])

    def sizes(self, shape: Sequence[Size], *, infer: bool = False) -> str:
        """Return the name of a shape as a tensor of integers.

        Args:
            shape: sizes of axes.
            infer: put −1 for one that is not known, as a reshape understands it.
        """
        unknown = [size for size in shape if not isinstance(size, int)]
        if not unknown or (infer and len(unknown) == 1):
            known = [size if isinstance(size, int) else -1 for size in shape]
            return self.constant(np.array(known, np.int64))
        parts = [
            self.constant(np.array([size], np.int64)) if isinstance(size, int) else self.size(size)
            for size in shape
        ]
        return self.add("Concat", *parts, axis=0)[0]

    def size(self, size: Size) -> str:
        """Return the name of a tensor [1] with a symbolic size."""
        factor, rest = multiple_of_batch(size)
        if rest or factor == 0:
            raise UserError(f"ONNX export knows sizes that are multiples of the batch, not {size}")
        if factor == 1:
            return self.batch
        return self.add("Mul", self.batch, self.constant(np.array([factor], np.int64)))[0]

    def full(self, value: Value, aval: Any) -> Value:
        """Return a value in the whole shape that a program says it has."""
        shape = tuple(aval.shape)
        if same_shape(value.shape, shape):
            return value
        if value.array is not None and all(isinstance(size, int) for size in shape):
            return Value.of(np.broadcast_to(value.array, shape))
        target = [
            1 if same_size(own, size) else size
            for own, size in zip(value.shape, shape, strict=True)
        ]
        return self.node("Expand", value, self.sizes(target), shape=shape, dtype=value.dtype)

    def reshape(self, value: Value, shape: Sequence[Size]) -> Value:
        """Return a value with its numbers in another shape."""
        shape = tuple(shape)
        if same_shape(value.shape, shape):
            return value
        if value.array is not None and all(isinstance(size, int) for size in shape):
            return Value.of(value.array.reshape(shape))
        target = self.sizes(shape, infer=True)
        return self.node("Reshape", value, target, shape=shape, dtype=value.dtype)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Return a value with its axes in another order."""
        if list(order) == list(range(len(order))):
            return value
        if value.array is not None:
            return Value.of(np.transpose(value.array, order))
        shape = [value.shape[axis] for axis in order]
        return self.node("Transpose", value, shape=shape, dtype=value.dtype, perm=list(order))


def same_size(one: Size, other: Size) -> bool:
    """Say whether two sizes are the same, whatever B is."""
    return isinstance(one, int) == isinstance(other, int) and bool(one == other)


def same_shape(one: Sequence[Size], other: Sequence[Size]) -> bool:
    """Say whether two shapes are the same, whatever B is."""
    return len(one) == len(other) and all(map(same_size, one, other))


def multiple_of_batch(size: Size) -> tuple[int, int]:
    """Return a and b of a size a B + b."""
    at = [int(size._evaluate({str(name): k for name in size._get_vars()})) for k in (1, 2)]
    return at[1] - at[0], 2 * at[0] - at[1]


Rule = Callable[[Graph, Any, list[Value]], Any]


def convert(graph: Graph, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]):
    """Add the nodes of a program to a graph.

    Args:
        graph: to which they are added.
        jaxpr: the program.
        consts: its constants: values, or arrays.
        inputs: its arguments.

    Returns:
        Its results, in the shapes the program says they have.

    Raises:
        UserError: for an operation that has no rule.
    """
    from mam.deploy.onnx_ops import RULES

    env: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        if not isinstance(atom, jex.Literal):
            return env[atom]
        aval: Any = atom.aval  # its value may be a number of Python's, whose own type is wider
        return Value.of(np.asarray(atom.val, aval.dtype))

    consts = [v if isinstance(v, Value) else Value.of(v) for v in consts]
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    for eqn in _needed(jaxpr):
        values = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        results = _folded(eqn, values)
        if results is None:
            if name not in RULES:
                raise UserError(
                    f"ONNX export knows no operation {name}, as in orders along a curve: take "
                    "--format stablehlo"
                )
            results = RULES[name](graph, eqn, values)
        results = results if isinstance(results, list) else [results]
        env.update(zip(eqn.outvars, results, strict=True))
    return [graph.full(read(atom), atom.aval) for atom in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[Any]:
    """List the operations whose results are read; loops carry nothing that is not."""
    read = {atom for atom in jaxpr.outvars if isinstance(atom, jex.Var)}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        if not read.intersection(eqn.outvars):
            continue
        if eqn.primitive.name == "while":
            eqn = _with_less_carry(eqn, [var in read for var in eqn.outvars])
        read.update(atom for atom in eqn.invars if isinstance(atom, jex.Var))
        needed.append(eqn)
    return needed[::-1]


def _with_less_carry(eqn: Any, is_read: list[bool]) -> Any:
    """Return a loop without what is carried to no end."""
    p = eqn.params
    condition, body = p["cond_jaxpr"], p["body_jaxpr"]
    for_cond, for_body = p["cond_nconsts"], p["body_nconsts"]
    carried = partial_eval.dce_jaxpr(condition.jaxpr, [True])[1][for_cond:]
    live = [a or b for a, b in zip(is_read, carried, strict=True)]
    while True:
        used = partial_eval.dce_jaxpr(body.jaxpr, live)[1][for_body:]
        more = [a or b for a, b in zip(live, used, strict=True)]
        if more == live:
            break
        live = more
    cond = partial_eval.dce_jaxpr(condition.jaxpr, [True], [True] * for_cond + live)[0]
    step = partial_eval.dce_jaxpr(body.jaxpr, live, [True] * for_body + live)[0]
    kept = [True] * (for_cond + for_body) + live
    closed = {"cond_jaxpr": condition.replace(jaxpr=cond), "body_jaxpr": body.replace(jaxpr=step)}
    return eqn.replace(
        invars=[atom for atom, keep in zip(eqn.invars, kept, strict=True) if keep],
        outvars=[var for var, keep in zip(eqn.outvars, live, strict=True) if keep],
        params=p | closed,
    )


def _folded(eqn: Any, values: list[Value]) -> list[Value] | None:
    """Compute an operation of constants; None if it is not one, or its result would be large."""
    from mam.deploy.onnx_ops import INLINED, KEPT_BROADCAST

    arrays = [value.array for value in values if value.array is not None]
    unfolded = (*INLINED, "broadcast_in_dim", "dim_as_value")
    if len(arrays) < len(values) or eqn.primitive.name in unfolded:
        return None
    if eqn.primitive.name in KEPT_BROADCAST:
        arrays = np.broadcast_arrays(*arrays)
        if eqn.primitive.name in ("convert_element_type",):
            return [Value.of(arrays[0].astype(eqn.params["new_dtype"]))]
    else:
        avals = [*(atom.aval for atom in eqn.invars), *(var.aval for var in eqn.outvars)]
        if not all(isinstance(size, int) for aval in avals for size in aval.shape):
            return None
        arrays = [
            np.broadcast_to(array, atom.aval.shape)
            for array, atom in zip(arrays, eqn.invars, strict=True)
        ]
    with jax.ensure_compile_time_eval():
        results = eqn.primitive.bind(*map(jax.numpy.asarray, arrays), **eqn.params)
    results = results if eqn.primitive.multiple_results else [results]
    return [Value.of(result) for result in results]
