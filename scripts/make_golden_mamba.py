"""Write `tests/golden/mamba.npz`: what an independent Mamba-1 computes, to compare our block with.

The reference is the PyTorch slow path, `MambaMixer.slow_forward`, of Hugging Face `transformers`,
on the CPU and with random weights (nothing is downloaded). The method is gone in 5.23 (4.57.6 has
it), hence the pin. Neither package is a dependency of this project; run the script from a scratch
environment (`$VENV`) outside the repository:

    python3.11 -m venv $VENV
    $VENV/bin/pip install torch==2.13.0 transformers==4.57.6 numpy
    $VENV/bin/python scripts/make_golden_mamba.py

Each case (`A`, `B`, ...) holds `param/<torch name>`, `input`, `cotangent`, `output`,
`output_float32`, `grad/input` and `grad/<torch name>` (gradients of `sum(output * cotangent)`), and
from decoding token by token from an empty cache `decode/output` and the final `decode/conv_state`
(oldest input first) and `decode/ssm_state`. All arrays are float32; all but `output_float32` were
computed by the module in float64 and then rounded. `slow_forward` casts A, B and the convolved
input to float32 even then, so they are good to about 1e-7 relative to their scale and no better.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaCache, MambaMixer

PATH = Path(__file__).resolve().parents[1] / "tests" / "golden" / "mamba.npz"

# name: (batch, length, config); C is shorter than its convolution
CASES = {
    "A": (
        2,
        7,
        {"hidden_size": 16, "state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 1},
    ),
    "B": (
        1,
        33,
        {"hidden_size": 24, "state_size": 8, "conv_kernel": 3, "expand": 2, "time_step_rank": 5},
    ),
    "C": (
        3,
        2,
        {"hidden_size": 8, "state_size": 16, "conv_kernel": 4, "expand": 1, "time_step_rank": 2},
    ),
}


@torch.no_grad()
def randomise(mixer: MambaMixer) -> None:
    """Draw every parameter at a scale that keeps output, decay and step sizes of ordinary size."""
    for name, param in mixer.named_parameters():
        match name:
            case "A_log":
                param.add_(0.3 * torch.randn_like(param))  # about the usual log(1..N)
            case "dt_proj.bias":
                param.uniform_(-4.0, 1.0)  # steps around 0.02 to 1.3 before the input moves them
            case "D" | "conv1d.bias":
                param.normal_()
            case _:
                param.normal_(std=param[0].numel() ** -0.5)


def decode(mixer: MambaMixer, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the cached path one token at a time, from zero states."""
    cache = MambaCache(mixer.config, inputs.shape[0], dtype=inputs.dtype)
    newest = torch.tensor(
        [mixer.conv_kernel_size - 1]
    )  # the slot a token takes in the rolling window
    outputs = [mixer.slow_forward(token, cache, newest) for token in inputs.split(1, dim=1)]
    return {
        "output": torch.cat(outputs, dim=1),
        "conv_state": cache.conv_states[0],
        "ssm_state": cache.ssm_states[0],
    }


def make_case(
    seed: int, batch: int, length: int, config: dict[str, int]
) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    mixer = MambaMixer(
        MambaConfig(
            **config, num_hidden_layers=1, use_conv_bias=True, use_bias=False, hidden_act="silu"
        ),
        layer_idx=0,
    )
    randomise(mixer)
    inputs, cotangent = torch.randn(2, batch, length, config["hidden_size"])
    case = {"input": inputs, "cotangent": cotangent, "output_float32": mixer.slow_forward(inputs)}

    mixer, inputs = mixer.double(), inputs.double().requires_grad_()
    case["output"] = mixer.slow_forward(inputs)
    (case["output"] * cotangent).sum().backward()
    case["grad/input"] = inputs.grad
    for name, param in mixer.named_parameters():
        case[f"param/{name}"], case[f"grad/{name}"] = param, param.grad
    with torch.no_grad():
        case |= {f"decode/{key}": value for key, value in decode(mixer, inputs).items()}
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
