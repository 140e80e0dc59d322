"""Write `tests/golden/mamba2.npz`: what an independent Mamba-2 computes, to compare ours with.

The reference is the pure PyTorch path, `Mamba2Mixer.torch_forward`, of Hugging Face `transformers`,
on the CPU and with random weights (nothing is downloaded). The method and its `Mamba2Cache` are
gone in 5.23 (4.57.6 has them), hence the pin. Neither package is a dependency of this project; run
the script from a scratch environment (`$VENV`) outside the repository:

    python3.11 -m venv $VENV
    $VENV/bin/pip install torch==2.13.0 transformers==4.57.6 numpy
    $VENV/bin/python scripts/make_golden_mamba2.py

Each case (`A`, `B`, ...) holds `param/<torch name>`, `input`, `cotangent`, `output`,
`output_float32`, `grad/input` and `grad/<torch name>` (gradients of `sum(output * cotangent)`), and
from decoding token by token from an empty cache `decode/output` and the final `decode/conv_state`
(oldest input first) and `decode/ssm_state`. All arrays are float32; all but `output_float32` were
computed by the module in float64 and then rounded. `torch_forward` casts A, B, C, the convolved
input and the gated norm to float32 even then, so values are good to about 1e-7 relative to their
scale and gradients, `dt_bias` the worst, to about 2e-6.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Cache, Mamba2Mixer

PATH = Path(__file__).resolve().parents[1] / "tests" / "golden" / "mamba2.npz"

# name: (batch, length, config); C is shorter than its convolution
CASES = {
    "A": (
        2,
        7,
        {
            "hidden_size": 16,
            "state_size": 4,
            "head_dim": 16,
            "conv_kernel": 4,
            "expand": 2,
            "chunk_size": 3,
        },
    ),
    "B": (
        1,
        33,
        {
            "hidden_size": 24,
            "state_size": 8,
            "head_dim": 16,
            "conv_kernel": 3,
            "expand": 2,
            "chunk_size": 8,
        },
    ),
    "C": (
        3,
        2,
        {
            "hidden_size": 8,
            "state_size": 16,
            "head_dim": 2,
            "conv_kernel": 4,
            "expand": 1,
            "chunk_size": 16,
        },
    ),
}


@torch.no_grad()
def randomise(mixer: Mamba2Mixer) -> None:
    """Draw every parameter at a scale that keeps output, decay and step sizes of ordinary size."""
    for name, param in mixer.named_parameters():
        match name:
            case "A_log" | "norm.weight":
                param.add_(0.3 * torch.randn_like(param))  # about the usual log(1..heads) and 1
            case "dt_bias":
                param.uniform_(-4.0, 1.0)  # steps around 0.02 to 1.3 before the input moves them
            case "D" | "conv1d.bias":
                param.normal_()
            case _:
                param.normal_(std=param[0].numel() ** -0.5)


def decode(
    mixer: Mamba2Mixer, config: Mamba2Config, inputs: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Run the cached path one token at a time, from zero states."""
    cache = Mamba2Cache(config, inputs.shape[0], dtype=inputs.dtype)
    later = torch.tensor([1])  # any position but 0, which would start a new sequence
    outputs = [mixer.torch_forward(token, cache, later) for token in inputs.split(1, dim=1)]
    return {
        "output": torch.cat(outputs, dim=1),
        "conv_state": cache.conv_states[0],
        "ssm_state": cache.ssm_states[0],
    }


def make_case(
    seed: int, batch: int, length: int, config: dict[str, int]
) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    num_heads = config["expand"] * config["hidden_size"] // config["head_dim"]
    config = Mamba2Config(
        **config,
        num_heads=num_heads,
        n_groups=1,
        num_hidden_layers=1,
        use_conv_bias=True,
        use_bias=False,
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    randomise(mixer)
    inputs, cotangent = torch.randn(2, batch, length, config.hidden_size)
    case = {"input": inputs, "cotangent": cotangent, "output_float32": mixer.torch_forward(inputs)}

    mixer, inputs = mixer.double(), inputs.double().requires_grad_()
    case["output"] = mixer.torch_forward(inputs)
    (case["output"] * cotangent).sum().backward()
    case["grad/input"] = inputs.grad
    for name, param in mixer.named_parameters():
        case[f"param/{name}"], case[f"grad/{name}"] = param, param.grad
    with torch.no_grad():
        case |= {f"decode/{key}": value for key, value in decode(mixer, config, inputs).items()}
    return case


def main() -> None:
    torch.set_num_threads(1)
    arrays = {
        "meta/torch": np.array(torch.__version__),
        "meta/transformers": np.array(transformers.__version__),
    }
    for seed, (name, spec) in enumerate(CASES.items()):
        for key, value in make_case(seed, *spec).items():
            arrays[f"{name}/{key}"] = value.detach().float().numpy()
    PATH.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {len(arrays)} arrays, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
