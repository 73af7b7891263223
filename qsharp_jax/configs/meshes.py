"""Meshes of devices by name, for `c.mesh = NAME` in a config and `--config.mesh=NAME`.

v4 and v5p names count TensorCores (two per chip), v5e and v6e names count chips; 2x256 is two slices of 256. The mesh
axes are described in qsharp_jax/models/meshes.py. Every number can be changed, as --config.mesh.decode.tensor=8.
`fit` uses all chips; `decode` uses those of one host, since each host decodes its own rows, or of as many hosts as its
sizes multiply to, a number that divides a slice's hosts, for a model that one host cannot hold.
"""

SINGLE = dict(
    name="single",
    platform="any",  # as JAX calls it: cpu, gpu, tpu, any
    kind="one device",
    topology="",  # of one slice, for `jax.experimental.topologies`; empty where there is none
    slices=1,  # included in `fit.data`; only `data` crosses slices
    hosts=1,  # per slice
    devices_per_host=1,
    fit=dict(data=1, fsdp=1, tensor=1),
    decode=dict(data=1, attention_data=1, tensor=1),
    # Per device, for `qsharp plan`; 0: not known.
    flops=0.0,  # dense bfloat16 per second
    hbm_bytes=0,
    vmem_bytes=0,  # fast memory beside it, where the compiler keeps a layer's temporaries
    hbm_bandwidth=0.0,  # bytes/s
    ici_bandwidth=0.0,  # bytes/s arriving from the other devices of the slice, over all links
    dcn_bandwidth=0.0,  # bytes/s arriving from other slices
)

# Google's numbers: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e. Interchip interconnect 2,400, 1,600, 4,800 and 3,584
# Gbps per chip; data center network of v5e and v6e 6.4 and 25.6 Tbps per pod of 256, of v4 and v5p 200 Gbps per host
# of 4.
CHIPS = {
    "v4": dict(flops=275e12, hbm_bytes=32 * 2**30, hbm_bandwidth=1.2e12, ici_bandwidth=300e9, dcn_bandwidth=6.25e9),
    "v5e": dict(flops=197e12, hbm_bytes=16 * 2**30, hbm_bandwidth=819e9, ici_bandwidth=200e9, dcn_bandwidth=3.125e9),
    "v5p": dict(flops=459e12, hbm_bytes=95 * 2**30, hbm_bandwidth=2.765e12, ici_bandwidth=600e9, dcn_bandwidth=6.25e9),
    "v6e": dict(flops=918e12, hbm_bytes=32 * 2**30, hbm_bandwidth=1.64e12, ici_bandwidth=448e9, dcn_bandwidth=12.5e9),
}
# The compiler puts a layer's temporaries there first; on v5p it leaves them in HBM.
CHIPS["v5e"]["vmem_bytes"] = CHIPS["v6e"]["vmem_bytes"] = 128 * 2**20
# NVIDIA's for an H100 SXM: nvidia.com/en-us/data-center/h100 (989 TFLOP/s without sparsity, NVLink 900 GB/s both ways).
H100 = dict(flops=989e12, hbm_bytes=80 * 10**9, hbm_bandwidth=3.35e12, ici_bandwidth=450e9)

# Chips along each side of a slice, by their number.
FLAT = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
DEEP = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)}


def tpu(name: str, generation: str, chips: int, slices: int = 1) -> dict:
    """Return a preset of TPUs with `chips` per slice."""
    flat = generation in ("v5e", "v6e")
    here = 8 if flat and chips == 8 else 4  # per host: the host of 8 chips is a slice by itself
    # Weights and optimizer are divided over all chips, rows over `fsdp`: with 64 chips or more, a batch of 32 to 64
    # rows has too few. And where `fsdp` would be a whole square or box, the TPU compiler has no way to scatter
    # gradients: it sums them whole on every chip, for twice the bytes (benchmarks/RESULTS.md).
    tensor = ({16: 2, 64: 2, 128: 4, 256: 4} if flat else {8: 2, 16: 2, 32: 2, 64: 2}).get(chips, 1)
    return SINGLE | CHIPS[generation] | dict(
        name=name, platform="tpu", kind=f"TPU {generation}", slices=slices, hosts=chips // here, devices_per_host=here,
        topology=f"{generation}:{'x'.join(map(str, (FLAT if flat else DEEP)[chips]))}",
        fit=dict(data=slices, fsdp=chips // tensor, tensor=tensor),
        decode=dict(data=1, attention_data=1, tensor=here),
    )  # fmt: skip


def cuda(name: str, devices: int) -> dict:
    return SINGLE | H100 | dict(
        name=name, platform="gpu", kind="H100", devices_per_host=devices,
        fit=dict(data=1, fsdp=devices, tensor=1),
        decode=dict(data=1, attention_data=1, tensor=devices),
    )  # fmt: skip


def _all() -> list[dict]:
    cores = [("v4", n) for n in (8, 16, 32, 64)] + [("v5p", n) for n in (8, 16, 32, 64, 128)]
    chips = [("v5e", n) for n in (4, 8, 16, 32, 64, 128, 256)] + [("v6e", n) for n in (4, 8, 16, 32, 64, 128, 256)]
    return [
        SINGLE,
        SINGLE | dict(name="cpu", platform="cpu", kind="CPU"),
        cuda("cuda_1", 1),
        cuda("cuda_8", 8),
        *(tpu(f"{generation}_{n}", generation, n // 2) for generation, n in cores),
        *(tpu(f"{generation}_{n}", generation, n) for generation, n in chips),
        tpu("v5p_2x128", "v5p", 64, slices=2),
        tpu("v5e_2x256", "v5e", 256, slices=2),
        tpu("v6e_2x256", "v6e", 256, slices=2),
    ]


PRESETS = {preset["name"]: preset for preset in _all()}
