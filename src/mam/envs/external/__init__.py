"""External (non-JAX) environments: those of PettingZoo, stepped in worker processes.

factories  a name → what makes the environment      spaces   its spaces ↔ rows of arrays
pettingzoo one ParallelEnv as stacked arrays        pool     many, in processes: `ExternalPool`
slice, worker (in the child), process (its parent's end), shared (memory): what the pool is made of
audit      what an environment does wrong, noted while it is played

Nothing here but `pool` imports JAX, and workers import all but that.
"""
