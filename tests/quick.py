"""Options under which programs compile in less time and run in more: most tests run theirs once."""

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
