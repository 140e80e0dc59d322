"""The official MAT (PyTorch): one joint action of 64 environments, as its runner asks for it.

    python benchmarks/peers/mat_peer.py 20 CHECKOUT 32

In an environment with PyTorch, given a checkout of PKU-MARL/Multi-Agent-Transformer. Sizes are
those of `mam bench act`.
"""

import os
import sys

import clock

NUM_ENVS, OBS_DIM, NUM_ACTIONS, WIDTH = 64, 32, 8, 64


def main(seconds: str, checkout: str, agents: str) -> None:
    """Time `get_actions` for a number of agents."""
    sys.path.insert(0, checkout)
    import numpy as np
    import torch
    from mat.algorithms.mat.algorithm.ma_transformer import MultiAgentTransformer

    torch.set_num_threads(os.cpu_count() or 1)
    num_agents = int(agents)
    network = MultiAgentTransformer(
        OBS_DIM, OBS_DIM, NUM_ACTIONS, num_agents, n_block=1, n_embd=WIDTH, n_head=1
    ).eval()
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((NUM_ENVS, num_agents, OBS_DIM), np.float32)
    legal = np.ones((NUM_ENVS, num_agents, NUM_ACTIONS), np.float32)

    @torch.no_grad()
    def step() -> None:
        network.get_actions(obs, obs, legal)

    parameters = sum(weight.numel() for weight in network.parameters())
    clock.report(clock.sample(step, float(seconds)), NUM_ENVS, parameters, ("torch",))


if __name__ == "__main__":
    main(*sys.argv[1:])
