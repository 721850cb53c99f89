"""The dtype in which a processor generates best.

A CPU with AVX512_BF16 or AMX_BF16 multiplies bfloat16 numbers in hardware and adds the products in
float32. On two Zen 4 cores, matrix products in bfloat16 were measured at 404 GFLOP/s, and in float32 at
157 to 207 (torch 2.13). Other x86 CPUs convert each number first, and are slower in bfloat16 than in
float32; Arm's were not measured.
"""

from __future__ import annotations

import torch

# Of `torch.cpu.get_capabilities`.
NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16")
# In place of that function in older releases of PyTorch.
_OLDER_QUERIES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def multiplies_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 in this CPU's hardware; False if PyTorch does not say.

    Its products and convolutions are those of oneDNN, which not every build has (macOS).
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in NATIVE_BFLOAT16)
    return any(getattr(torch.cpu, query, bool)() for query in _OLDER_QUERIES)


def generation_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype for generating on a device.

    Args:
        device: where the stages run.

    Returns:
        float16 for CUDA, bfloat16 for a CPU that multiplies it in hardware, otherwise float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.float16
    return torch.bfloat16 if kind == "cpu" and multiplies_bfloat16() else torch.float32
