"""Memory bandwidths of GPUs."""

from __future__ import annotations

from typing import NamedTuple

# Part of an H200's 4.8 TB/s that a copy reaches, read and written (docs/performance.md); taken for
# the others, too.
COPY_SHARE = 4.25 / 4.8

_SITE = "https://www.nvidia.com/en-us/"


class Gpu(NamedTuple):
    """A GPU of NVIDIA's.

    Attributes:
        gb_per_s: bandwidth of its memory by the maker's datasheet or product page.
        capability: its compute capability.
        source: that page.
    """

    gb_per_s: float
    capability: str
    source: str

    @property
    def copy_gb_per_s(self) -> float:
        """Bytes that a copy is taken to read and write, in GB/s."""
        return self.gb_per_s * COPY_SHARE


GPUS = {
    "H200": Gpu(4800, "9.0", f"{_SITE}data-center/h200/"),
    "H100 SXM": Gpu(3350, "9.0", f"{_SITE}data-center/h100/"),
    "H100 NVL": Gpu(3900, "9.0", f"{_SITE}data-center/h100/"),
    # 64 TB/s of eight in a DGX B200.
    "B200": Gpu(8000, "10.0", f"{_SITE}data-center/dgx-b200/"),
    "A100 80GB SXM": Gpu(2039, "8.0", f"{_SITE}data-center/a100/"),
    "A100 80GB PCIe": Gpu(1935, "8.0", f"{_SITE}data-center/a100/"),
    "L40S": Gpu(864, "8.9", f"{_SITE}data-center/l40s/"),
    "L4": Gpu(300, "8.9", f"{_SITE}data-center/l4/"),
    "RTX 5090": Gpu(1792, "12.0", f"{_SITE}geforce/graphics-cards/50-series/rtx-5090/"),
    "RTX 4090": Gpu(1008, "8.9", f"{_SITE}geforce/graphics-cards/40-series/rtx-4090/"),
    "RTX 3090": Gpu(936, "8.6", f"{_SITE}geforce/graphics-cards/30-series/rtx-3090-3090ti/"),
}
