"""XLA options of the tests: they compile far longer than they compute, so XLA hurries."""

from importlib.metadata import version


def quick_compile(devices: int = 1) -> str:
    """`XLA_FLAGS` for so many CPU devices and as little optimisation as there is."""
    flags = ["--xla_backend_optimization_level=0"]
    if tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):
        # A third less to compile. Later versions have no such choice and stop at unknown flags.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    if devices > 1:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    return " ".join(flags)
