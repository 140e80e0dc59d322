"""The operations of JAX as operators of ONNX, one rule each; see `onnx_graph`."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mam.deploy.onnx_graph import Graph, Rule, Value, convert, same_size
from mam.errors import UserError

_UNARY = {
    "neg": "Neg",
    "exp": "Exp",
    "log": "Log",
    "tanh": "Tanh",
    "logistic": "Sigmoid",
    "sqrt": "Sqrt",
    "abs": "Abs",
    "sin": "Sin",
    "cos": "Cos",
    "sign": "Sign",
    "floor": "Floor",
    "not": "Not",
    "erf": "Erf",
    "atanh": "Atanh",
}
_BINARY = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "pow": "Pow",
    "and": "And",
    "or": "Or",
    "xor": "Xor",
    "eq": "Equal",
    "lt": "Less",
    "gt": "Greater",
    "le": "LessOrEqual",
    "ge": "GreaterOrEqual",
    "add_any": "Add",
}
_COMPOSED = ("ne", "rsqrt", "square", "integer_pow", "log1p", "expm1", "select_n", "clamp")
# Operations that a broadcast may wait behind.
KEPT_BROADCAST = frozenset((*_UNARY, *_BINARY, *_COMPOSED, "convert_element_type"))
# Operations whose own program is put in their place.
INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint")

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Return a decorator that makes a function the rule of primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _stored(values: Sequence[Value]) -> tuple[Any, ...]:
    """Return the shape of an elementwise result, as it is stored."""
    rank = max(len(value.shape) for value in values)
    shape = []
    for axis in range(-rank, 0):
        sizes = [v.shape[axis] for v in values if len(v.shape) >= -axis]
        wide = [size for size in sizes if not same_size(size, 1)]
        shape.append(wide[0] if wide else 1)
    return tuple(shape)


def _elementwise(graph: Graph, op: str, *values: Value, dtype: Any = None) -> Value:
    return graph.node(op, *values, shape=_stored(values), dtype=dtype or values[0].dtype)


def _like(value: Value, number: float) -> Value:
    return Value.of(np.asarray(number, value.dtype))


def _simple(op: str, graph: Graph, eqn: Any, values: list[Value]) -> Value:
    if op in ("And", "Or", "Xor", "Not") and values[0].dtype != np.bool_:
        raise UserError(f"ONNX export knows {eqn.primitive.name} of bools only")
    return _elementwise(graph, op, *values, dtype=eqn.outvars[0].aval.dtype)


RULES.update({name: partial(_simple, op) for name, op in (_UNARY | _BINARY).items()})


@rule("ne")
def _ne(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    return _elementwise(graph, "Not", _elementwise(graph, "Equal", *values, dtype=np.bool_))


@rule("square")
def _square(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    return _elementwise(graph, "Mul", values[0], values[0])


@rule("integer_pow")
def _integer_pow(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    (x,), power = values, eqn.params["y"]
    result = x
    for _ in range(abs(power) - 1):
        result = _elementwise(graph, "Mul", result, x)
    return result if power > 0 else _elementwise(graph, "Reciprocal", result)


@rule("rsqrt")
def _rsqrt(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    return _elementwise(graph, "Reciprocal", _elementwise(graph, "Sqrt", values[0]))


@rule("log1p")
def _log1p(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    return _elementwise(graph, "Log", _elementwise(graph, "Add", values[0], _like(values[0], 1)))


@rule("expm1")
def _expm1(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    return _elementwise(graph, "Sub", _elementwise(graph, "Exp", values[0]), _like(values[0], 1))


@rule("clamp")
def _clamp(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    low, x, high = values
    return _elementwise(graph, "Min", _elementwise(graph, "Max", x, low), high)


@rule("select_n")
def _select(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    which, *cases = values
    if len(cases) != 2 or which.dtype != np.bool_:
        raise UserError("ONNX export knows a choice between two values only")
    dtype = cases[0].dtype
    if dtype in (np.bool_, np.int16, np.uint16):  # between which onnxruntime does not choose
        cases = [cast(graph, case, np.int32) for case in cases]
    wide = cases[0].dtype
    chosen = graph.node("Where", which, *cases[::-1], shape=_stored(values), dtype=wide)
    return cast(graph, chosen, dtype)


@rule("convert_element_type")
def _cast(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    return cast(graph, values[0], eqn.params["new_dtype"])


def cast(graph: Graph, value: Value, dtype: Any) -> Value:
    """Return a value in another type."""
    from onnx import helper

    if value.dtype == dtype:
        return value
    to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return graph.node("Cast", value, shape=value.shape, dtype=dtype, to=to)


@rule("stop_gradient", "copy", "copy_p", "optimization_barrier")
def _identity(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    return values


@rule("broadcast_in_dim")
def _broadcast(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    stored = [1] * len(shape)
    for own, axis in zip(values[0].shape, axes, strict=True):
        stored[axis] = own
    return graph.reshape(values[0], stored)


def _whole(function: Rule) -> Rule:
    """Make a rule read values in their whole shapes."""

    def whole(graph: Graph, eqn: Any, values: list[Value]) -> Any:
        atoms = zip(values, eqn.invars, strict=True)
        return function(graph, eqn, [graph.full(value, atom.aval) for value, atom in atoms])

    return whole


@rule("reshape", "squeeze", "expand_dims")
@_whole
def _reshape(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    return graph.reshape(values[0], eqn.outvars[0].aval.shape)


@rule("transpose")
@_whole
def _transpose(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    return graph.transpose(values[0], eqn.params["permutation"])


@rule("concatenate")
@_whole
def _concatenate(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    aval = eqn.outvars[0].aval
    axis = eqn.params["dimension"]
    return graph.node("Concat", *values, shape=aval.shape, dtype=aval.dtype, axis=axis)


@rule("stack")
@_whole
def _stack(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    aval, axis = eqn.outvars[0].aval, eqn.params["axis"]
    rows = [graph.reshape(v, (*v.shape[:axis], 1, *v.shape[axis:])) for v in values]
    return graph.node("Concat", *rows, shape=aval.shape, dtype=aval.dtype, axis=axis)


@rule("split")
@_whole
def _split(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    sizes = np.array(eqn.params["sizes"], np.int64)
    names = graph.add(
        "Split",
        values[0],
        graph.constant(sizes),
        outputs=len(sizes),
        axis=eqn.params["axis"],
    )
    avals = [var.aval for var in eqn.outvars]
    return [Value(a.shape, a.dtype, name) for a, name in zip(avals, names, strict=True)]


def _slices(
    graph: Graph, x: Value, aval: Any, axes: Sequence[int], *bounds: Sequence[int]
) -> Value:
    tensors = [graph.constant(np.array(b, np.int64)) for b in (*bounds[:2], axes, *bounds[2:])]
    return graph.node("Slice", x, *tensors, shape=aval.shape, dtype=aval.dtype)


@rule("slice")
@_whole
def _slice(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    p, (x,) = eqn.params, values
    strides = p["strides"] or (1,) * len(x.shape)
    cut = [
        axis
        for axis, size in enumerate(x.shape)
        if not (same_size(p["limit_indices"][axis], size) and strides[axis] == 1)
        or p["start_indices"][axis]
    ]
    if not cut:
        return x
    bounds = (p["start_indices"], p["limit_indices"], strides)
    return _slices(graph, x, eqn.outvars[0].aval, cut, *([b[axis] for axis in cut] for b in bounds))


@rule("rev")
@_whole
def _rev(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    axes = eqn.params["dimensions"]
    count, last = len(axes), np.iinfo(np.int64)
    bounds = ([-1] * count, [last.min] * count, [-1] * count)
    return _slices(graph, values[0], eqn.outvars[0].aval, axes, *bounds)


@rule("pad")
@_whole
def _pad(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    (x, fill), config, aval = values, eqn.params["padding_config"], eqn.outvars[0].aval
    if any(low < 0 or high < 0 for low, high, _ in config):
        raise UserError("ONNX export knows no padding that takes away")
    if aval.dtype == np.bool_:  # which onnxruntime does not pad
        x, fill = (cast(graph, v, np.int32) for v in (x, fill))
    for axis, (*_, inner) in enumerate(config):
        if inner:
            x = _spread(graph, x, fill, axis, inner + 1)
    pads = np.array([low for low, *_ in config] + [high for _, high, _ in config], np.int64)
    if pads.any():
        ends = graph.constant(pads)
        x = graph.node("Pad", x, ends, fill, shape=aval.shape, dtype=x.dtype, mode="constant")
    return cast(graph, x, aval.dtype)


def _spread(graph: Graph, x: Value, fill: Value, axis: int, step: int) -> Value:
    """Return an axis whose entries are `step` apart, with `fill` in between."""
    before, n, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    pads = np.zeros(2 * len(x.shape) + 2, np.int64)
    pads[-len(after) - 1] = step - 1
    rows = graph.node(
        *("Pad", graph.reshape(x, (*before, n, 1, *after)), graph.constant(pads), fill),
        shape=(*before, n, step, *after),
        dtype=x.dtype,
        mode="constant",
    )
    flat = graph.reshape(rows, (*before, n * step, *after))
    return _between(graph, flat, Value.of(np.int64(0)), (n - 1) * step + 1, axis)


def _reduce(op: str, graph: Graph, eqn: Any, values: list[Value]) -> Value:
    aval, axes = eqn.outvars[0].aval, graph.constant(np.array(eqn.params["axes"], np.int64))
    x = values[0]
    if x.dtype == np.bool_:
        x = cast(graph, x, np.int32)
    reduced = graph.node(op, x, axes, shape=aval.shape, dtype=x.dtype, keepdims=0)
    return cast(graph, reduced, aval.dtype)


for _name, _op in {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_or": "ReduceMax",
    "reduce_and": "ReduceMin",
}.items():
    RULES[_name] = _whole(partial(_reduce, _op))


@rule("argmax")
@_whole
def _argmax(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    aval, (axis,) = eqn.outvars[0].aval, eqn.params["axes"]
    found = graph.node("ArgMax", values[0], shape=aval.shape, dtype=np.int64, axis=axis, keepdims=0)
    return cast(graph, found, aval.dtype)


@rule("cumsum")
@_whole
def _cumsum(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    aval, axis = eqn.outvars[0].aval, graph.constant(np.array(eqn.params["axis"], np.int64))
    reverse = int(eqn.params["reverse"])
    return graph.node(
        "CumSum", values[0], axis, shape=aval.shape, dtype=aval.dtype, reverse=reverse
    )


@rule("cummax")
@_whole
def _cummax(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    if not same_size(values[0].shape[eqn.params["axis"]], 1):
        raise UserError("ONNX export knows a running maximum over one element only")
    return values[0]


@rule("iota")
def _iota(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    index = np.arange(shape[axis], dtype=eqn.params["dtype"])  # static: the rest is a broadcast
    return Value.of(index.reshape([-1 if i == axis else 1 for i in range(len(shape))]))


@rule("dot_general")
@_whole
def _dot(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    """Bring both sides into the form of a product of stacked matrices."""
    (contract, batch), aval = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    free = [
        [axis for axis in range(len(v.shape)) if axis not in (*contract[i], *batch[i])]
        for i, v in enumerate(values)
    ]
    left = graph.transpose(values[0], (*batch[0], *free[0], *contract[0]))
    right = graph.transpose(values[1], (*batch[1], *contract[1], *free[1]))
    stacked = left.shape[: len(batch[0])]
    inner = math.prod(values[1].shape[a] for a in contract[1])
    rows = [values[0].shape[a] for a in free[0]]
    columns = [values[1].shape[a] for a in free[1]]
    if len(contract[0]) != 1 or (stacked and len(rows) != 1):
        left = graph.reshape(left, (*stacked, *([math.prod(rows)] if stacked else rows), inner))
    if len(contract[1]) != 1 or len(columns) != 1:
        right = graph.reshape(right, (*stacked, inner, math.prod(columns)))
    vector = not stacked and not rows
    if vector:
        left = graph.reshape(left, (1, inner))
    shape = (*left.shape[:-1], math.prod(columns))
    product = graph.node("MatMul", left, right, shape=shape, dtype=aval.dtype)
    return graph.reshape(product, aval.shape)


@rule("gather")
@_whole
def _gather(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    """Gather single entries of some axes and all of the others, or cut one slice."""
    (x, index), p, aval = values, eqn.params, eqn.outvars[0].aval
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    if len(index.shape) == 1:
        for place, axis in enumerate(numbers.start_index_map):
            one = np.array([place], np.int64)
            start = (
                Value.of(index.array[place])
                if index.array is not None
                else graph.node("Gather", index, graph.constant(one), shape=(1,), dtype=index.dtype)
            )
            x = _between(graph, x, start, sizes[axis], axis)
        return graph.reshape(x, aval.shape)
    indexed, stacked = numbers.start_index_map, numbers.operand_batching_dims
    rest = [axis for axis in range(len(x.shape)) if axis not in (*indexed, *stacked)]
    entries = all(axis in numbers.collapsed_slice_dims and sizes[axis] == 1 for axis in indexed)
    if not entries or not all(same_size(sizes[axis], x.shape[axis]) for axis in rest):
        raise UserError("ONNX export knows indexing by entries only, not by slices")
    x = graph.transpose(x, (*stacked, *indexed, *rest))
    own = numbers.start_indices_batching_dims
    others = [axis for axis in range(len(index.shape) - 1) if axis not in own]
    index = cast(graph, graph.transpose(index, (*own, *others, len(index.shape) - 1)), np.int64)
    shape = (*index.shape[:-1], *(x.shape[len(stacked) + len(indexed) :]))
    if not stacked and len(indexed) == 1:
        index = graph.reshape(index, index.shape[:-1])
        found = graph.node("Gather", x, index, shape=shape, dtype=x.dtype, axis=0)
    else:
        batch_dims = len(stacked)
        found = graph.node("GatherND", x, index, shape=shape, dtype=x.dtype, batch_dims=batch_dims)
    # The axes of the indices in their own order, and the others where they belong.
    at = iter([(*own, *others).index(axis) for axis in range(len(own) + len(others))])
    slices = iter(range(len(own) + len(others), len(shape)))
    offsets = numbers.offset_dims
    order = [next(slices) if axis in offsets else next(at) for axis in range(len(aval.shape))]
    return graph.transpose(found, order)


@rule("sort")
@_whole
def _sort(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    """Sort by integers; where they are equal, by place, as a stable sort does."""
    axis, n = eqn.params["dimension"], values[0].shape[eqn.params["dimension"]]
    key = values[0]
    if eqn.params["num_keys"] != 1 or np.issubdtype(key.dtype, np.floating):
        raise UserError("ONNX export knows sorting by one integer only")
    places = np.arange(n).reshape([-1 if i == axis else 1 for i in range(len(key.shape))])
    key = _elementwise(graph, "Mul", cast(graph, key, np.int64), Value.of(np.int64(n)))
    key = _elementwise(graph, "Add", key, Value.of(places.astype(np.int64)))
    count = graph.constant(np.array([n], np.int64))
    order = graph.add("TopK", key, count, outputs=2, axis=axis, largest=0, sorted=1)[1]
    return [
        graph.node("GatherElements", v, order, shape=v.shape, dtype=v.dtype, axis=axis)
        for v in values
    ]


@rule("dynamic_slice")
@_whole
def _dynamic_slice(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    (x, *starts), aval = values, eqn.outvars[0].aval
    for axis, start in enumerate(starts):
        x = _between(graph, x, start, aval.shape[axis], axis)
    return x


def _between(graph: Graph, x: Value, start: Value, size: Any, axis: int) -> Value:
    """Return `size` entries of one axis from `start` on."""
    if same_size(x.shape[axis], size):
        return x
    begin, end = _bounds(graph, start, size)
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    axes = graph.constant(np.array([axis], np.int64))
    return graph.node("Slice", x, begin, end, axes, shape=shape, dtype=x.dtype)


def _bounds(graph: Graph, start: Value, size: int) -> tuple[Value, Value]:
    begin = start if start.array is None else Value.of(start.array.astype(np.int64))
    begin = graph.reshape(cast(graph, begin, np.int64), (1,))
    if begin.array is not None:
        return begin, Value.of(begin.array + size)
    return begin, _elementwise(graph, "Add", begin, Value.of(np.array([size], np.int64)))


@rule("dynamic_update_slice")
@_whole
def _dynamic_update_slice(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    x, update, *starts = values
    cut = [a for a, size in enumerate(x.shape) if not same_size(size, update.shape[a])]
    if not cut:
        return update
    (axis,) = cut
    n, size = x.shape[axis], update.shape[axis]
    places = np.arange(n).reshape([-1 if i == axis else 1 for i in range(len(x.shape))])
    if size == 1:
        start = cast(graph, starts[axis], np.int64)
        here = _elementwise(graph, "Equal", Value.of(places), start, dtype=np.bool_)
        return graph.node("Where", here, update, x, shape=x.shape, dtype=x.dtype)
    begin, end = _bounds(graph, starts[axis], size)
    axes = graph.constant(np.array([axis], np.int64))
    zero, last = (graph.constant(np.array([k], np.int64)) for k in (0, n))
    before = graph.add("Slice", x, zero, begin, axes)[0]
    after = graph.add("Slice", x, end, last, axes)[0]
    return graph.node("Concat", before, update, after, shape=x.shape, dtype=x.dtype, axis=axis)


@rule("conv_general_dilated")
@_whole
def _conv(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    p, aval = eqn.params, eqn.outvars[0].aval
    lhs, rhs, out = p["dimension_numbers"]
    x, weight = graph.transpose(values[0], lhs), graph.transpose(values[1], rhs)
    pads = [low for low, _ in p["padding"]] + [high for _, high in p["padding"]]
    shape = [aval.shape[axis] for axis in out]
    y = graph.node(
        *("Conv", x, weight),
        shape=shape,
        dtype=aval.dtype,
        strides=list(p["window_strides"]),
        pads=pads,
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
    )
    return graph.transpose(y, [out.index(axis) for axis in range(len(out))])


@rule("dim_as_value")
def _dim_as_value(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    size = Value((1,), np.dtype(np.int64), graph.size(eqn.params["dim"]))
    return cast(graph, graph.reshape(size, ()), eqn.outvars[0].aval.dtype)


@rule(*INLINED)
def _inline(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    named = _NAMED.get(eqn.params.get("name", ""))
    if named is not None:
        return [named(graph, eqn, values)]
    jaxpr = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    closed = hasattr(jaxpr, "jaxpr")
    return convert(graph, jaxpr.jaxpr if closed else jaxpr, jaxpr.consts if closed else [], values)


def _gelu(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    x = values[0]
    return graph.node("Gelu", x, shape=x.shape, dtype=x.dtype, approximate="tanh")


def _softplus(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    """Compute max(x, 0) + log(1 + exp(−|x|)): a third of the time of the operator Softplus."""
    (x,) = values
    below = _elementwise(graph, "Neg", _elementwise(graph, "Abs", x))
    rest = _log1p(graph, eqn, [_elementwise(graph, "Exp", below)])
    return _elementwise(graph, "Add", _elementwise(graph, "Max", x, _like(x, 0)), rest)


def _normalised_rows(graph: Graph, eqn: Any, values: list[Value]) -> Value:
    """Normalise as one operator; of RMSNorm, the form that ONNX Runtime makes one of."""
    (x, scale, *offset), eps = values[:-1], float(np.asarray(values[-1].array))
    if offset:
        (offset,) = offset
        how = {"shape": x.shape, "dtype": x.dtype, "axis": -1, "epsilon": eps}
        return graph.node("LayerNormalization", x, scale, offset, **how)
    squares = _elementwise(graph, "Pow", x, _like(x, 2))
    axis, shape = graph.constant(np.array([-1], np.int64)), (*x.shape[:-1], 1)
    mean = graph.node("ReduceMean", squares, axis, shape=shape, dtype=x.dtype, keepdims=1)
    root = _elementwise(graph, "Sqrt", _elementwise(graph, "Add", mean, _like(x, eps)))
    return _elementwise(graph, "Mul", _elementwise(graph, "Div", x, root), scale)


# Functions that are operators of their own, or few of them.
_NAMED = {
    "gelu": _gelu,
    "softplus": _softplus,
    "normalised_rows": _whole(_normalised_rows),
}


def _subgraph(graph: Graph, name: str, inputs: list[Value], outputs: list[Value]) -> Any:
    """Return the finished body of a loop or a branch."""
    from onnx import helper

    own, results = {name for node in graph.nodes for name in node.output}, []
    for value in outputs:
        if value.name not in own:  # a result is made here, and is one only
            value = graph.node("Identity", value, shape=value.shape, dtype=value.dtype)
        own.discard(value.name)
        results.append(value)
    infos = [[tensor_info(v) for v in values] for values in (inputs, results)]
    return helper.make_graph(graph.nodes, name, *infos, initializer=graph.initializers)


def tensor_info(value: Value) -> Any:
    """Return the declaration of a value, its symbolic sizes by name."""
    from onnx import helper

    sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
    return helper.make_tensor_value_info(
        value.name, helper.np_dtype_to_tensor_dtype(value.dtype), sizes
    )


def _argument(graph: Graph, aval: Any) -> Value:
    return Value(tuple(aval.shape), np.dtype(aval.dtype), graph.fresh("x"))


@rule("scan")
@_whole
def _scan(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    p = eqn.params
    closed, num_consts, num_carry = p["jaxpr"], p["num_consts"], p["num_carry"]
    consts, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
    xs = values[num_consts + num_carry :]
    if p["length"] == 1:
        xs = [graph.reshape(x, x.shape[1:]) for x in xs]
        results = convert(graph, closed.jaxpr, closed.consts, [*consts, *carry, *xs])
        ys = [graph.reshape(y, (1, *y.shape)) for y in results[num_carry:]]
        return [*results[:num_carry], *ys]
    body = graph.body()
    arguments = [_argument(body, var.aval) for var in closed.jaxpr.invars[num_consts:]]
    unread = []
    if not xs:  # a scan of ONNX reads something
        xs = [Value.of(np.zeros(p["length"], np.float32))]
        unread = [Value((), np.dtype(np.float32), body.fresh("x"))]
    results = convert(body, closed.jaxpr, closed.consts, [*consts, *arguments])
    inputs = [*arguments, *unread]
    avals, num_ys = [var.aval for var in eqn.outvars], len(eqn.outvars) - num_carry
    direction = int(p["reverse"])
    names = graph.add(
        "Scan",
        *carry,
        *xs,
        outputs=len(avals),
        body=_subgraph(body, graph.fresh("body"), inputs, results),
        num_scan_inputs=len(xs),
        scan_input_directions=[direction] * len(xs),
        scan_output_directions=[direction] * num_ys,
    )
    return [Value(tuple(a.shape), a.dtype, name) for a, name in zip(avals, names, strict=True)]


@rule("while")
@_whole
def _while(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    p = eqn.params
    condition, step = p["cond_jaxpr"], p["body_jaxpr"]
    for_cond, rest = values[: p["cond_nconsts"]], values[p["cond_nconsts"] :]
    for_body, carry = rest[: p["body_nconsts"]], rest[p["body_nconsts"] :]
    (goes_on,) = convert(graph, condition.jaxpr, condition.consts, [*for_cond, *carry])
    body = graph.body()
    counter = Value((), np.dtype(np.int64), body.fresh("i"))
    before = Value((), np.dtype(np.bool_), body.fresh("goes_on"))
    arguments = [_argument(body, var.aval) for var in step.jaxpr.invars[p["body_nconsts"] :]]
    after = convert(body, step.jaxpr, step.consts, [*for_body, *arguments])
    again = convert(body, condition.jaxpr, condition.consts, [*for_cond, *after])
    loop = _subgraph(body, graph.fresh("body"), [counter, before, *arguments], [*again, *after])
    names = graph.add("Loop", "", goes_on, *carry, outputs=len(carry), body=loop)
    avals = [var.aval for var in eqn.outvars]
    return [Value(tuple(a.shape), a.dtype, name) for a, name in zip(avals, names, strict=True)]


@rule("cond")
@_whole
def _cond(graph: Graph, eqn: Any, values: list[Value]) -> list[Value]:
    which, *arguments = values
    if len(eqn.params["branches"]) != 2:
        raise UserError("ONNX export knows a choice between two branches only")
    branches = []
    for closed in eqn.params["branches"]:
        body = graph.body()
        results = convert(body, closed.jaxpr, closed.consts, arguments)
        branches.append(_subgraph(body, graph.fresh("branch"), [], results))
    avals = [var.aval for var in eqn.outvars]
    names = graph.add(
        "If",
        cast(graph, which, np.bool_),
        outputs=len(avals),
        then_branch=branches[1],
        else_branch=branches[0],
    )
    return [Value(tuple(a.shape), a.dtype, name) for a, name in zip(avals, names, strict=True)]
