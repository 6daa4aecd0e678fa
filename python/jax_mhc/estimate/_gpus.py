"""Memory bandwidths of GPUs."""

from __future__ import annotations

from typing import NamedTuple

# Part of an H200's 4.8 TB/s that a copy reaches, read and written (docs/performance.md); taken for
# the others, too.
COPY_SHARE = 4.25 / 4.8

_SITE = "https://www.nvidia.com/en-us/data-center"
_PAPERS = "https://images.nvidia.com/aem-dam/Solutions/geforce"
_BLACKWELL = f"{_PAPERS}/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_ADA = f"{_PAPERS}/ada/nvidia-ada-gpu-architecture.pdf"
_GA102 = (
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)


class Gpu(NamedTuple):
    """A GPU of NVIDIA's.

    Attributes:
        gb_per_s: bandwidth of its memory by the maker's datasheet, product page or white paper.
        capability: its compute capability.
        source: where the maker states the bandwidth.
    """

    gb_per_s: float
    capability: str
    source: str

    @property
    def copy_gb_per_s(self) -> float:
        """Bytes that a copy is taken to read and write, in GB/s."""
        return self.gb_per_s * COPY_SHARE


# GDDR's bandwidth is the width of its bus times the rate of a pin, in the comments behind the rows.
GPUS = {
    "H200": Gpu(4800, "9.0", f"{_SITE}/h200/"),
    "H100 SXM": Gpu(3350, "9.0", f"{_SITE}/h100/"),
    "H100 NVL": Gpu(3900, "9.0", f"{_SITE}/h100/"),
    # 64 TB/s of eight in a DGX B200. The bus and the clock that a driver told in 2026 (7680 bits,
    # 3996 MHz) make 7672 GB/s: https://github.com/pytorch/ao/pull/4002.
    "B200": Gpu(8000, "10.0", f"{_SITE}/dgx-b200/"),
    "A100 80GB SXM": Gpu(2039, "8.0", f"{_SITE}/a100/"),
    "A100 80GB PCIe": Gpu(1935, "8.0", f"{_SITE}/a100/"),
    "L40S": Gpu(864, "8.9", f"{_SITE}/l40s/"),  # 384 bits, 18 Gb/s
    "L4": Gpu(300, "8.9", f"{_SITE}/l4/"),  # 192 bits, 12.5 Gb/s
    "RTX 5090": Gpu(1792, "12.0", _BLACKWELL),  # 512 bits, 28 Gb/s
    "RTX 4090": Gpu(1008, "8.9", _ADA),  # 384 bits, 21 Gb/s
    "RTX 3090": Gpu(936, "8.6", _GA102),  # 384 bits, 19.5 Gb/s
}
