"""The dense layer's product, with the native kernel for its weight's gradient where faster."""

from jaxtyping import Array, Float

from mam.kernels.native.dense import native_product, native_product_supports
from mam.kernels.native.library import is_portable, use_native


def dense(
    x: Float[Array, "*batch I"], weight: Float[Array, "I O"], bias: Float[Array, "O"] | None = None
) -> Float[Array, "*batch O"]:
    """Return x W + b.

    Args:
        x: rows of I features; their type is that of the product and of what returns.
        weight: W, cast to it; its gradient comes from the native kernel where that is faster.
        bias: b, cast to it; zeros if None.
    """
    if is_portable():
        y = x @ weight.astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)
    # One 2-D product: with more axes XLA transposes in the backward pass, at twice the cost on CPU.
    rows, weight = x.reshape(-1, x.shape[-1]), weight.astype(x.dtype)
    y = (
        native_product(rows, weight)
        if use_native() and native_product_supports(rows, weight)
        else rows @ weight
    )
    y = y.reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + bias.astype(x.dtype)
