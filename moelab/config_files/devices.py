"""Names of devices, as drivers give them and files are named by them: which are known, and what a doubtful one may mean."""

from __future__ import annotations

from moelab.errors import nearest_names

DEVICES = (
    "AMD_Instinct_MI300X", "AMD_Instinct_MI308X", "AMD_Instinct_MI325X", "AMD_Instinct_MI325_OAM", "AMD_Instinct_MI350X",
    "AMD_Instinct_MI350_OAM", "AMD_Instinct_MI355X", "AMD_Instinct_MI355_OAM", "AMD_Radeon_Graphics", "AMD_Radeon_R9700",
    "NVIDIA_A100-SXM4-40GB", "NVIDIA_A100-SXM4-80GB", "NVIDIA_A100_80GB_PCIe", "NVIDIA_A800-SXM4-80GB", "NVIDIA_B200",
    "NVIDIA_B300_SXM6_AC", "NVIDIA_GB10", "NVIDIA_GB200", "NVIDIA_GB300", "NVIDIA_GeForce_RTX_4090", "NVIDIA_H100_80GB_HBM3",
    "NVIDIA_H100_PCIe", "NVIDIA_H20", "NVIDIA_H20-3e", "NVIDIA_H200", "NVIDIA_H200_NVL", "NVIDIA_H800", "NVIDIA_L20",
    "NVIDIA_L20Y", "NVIDIA_L40S", "NVIDIA_RTX_5880_Ada_Generation", "NVIDIA_RTX_6000_Ada_Generation",
    "NVIDIA_RTX_PRO_6000_Blackwell_Max-Q_Workstation_Edition", "NVIDIA_RTX_PRO_6000_Blackwell_Server_Edition",
    "NVIDIA_RTX_PRO_6000_Blackwell_Workstation_Edition", "Radeon_8060S_Graphics",
)  # fmt: skip
"""Devices of the tuned files that sglang 0.5.23 and vLLM 0.33.0 ship, but for an empty name and NVIDIA_H100, which no driver
gives."""


def device_doubt(device: str) -> str | None:
    """What may be wrong with a device's name, in a sentence; None for one that is known. `_` may stand for spaces."""
    from moelab.roofline import device_names

    known = sorted({*DEVICES, *device_names()})
    spelled = device.strip().replace(" ", "_")
    if spelled in known:
        return None
    words = set(spelled.lower().replace("-", "_").split("_"))
    alike = [name for name in known if words <= set(name.lower().replace("-", "_").split("_"))]
    meant = f" Did you mean {', '.join(alike[:3])}?" if alike else nearest_names(spelled, known)
    return (
        f"No device {device!r} is known here, and a file for it would be found on no other.{meant} Expected the name as the "
        "driver gives it, such as 'NVIDIA H200' (nvidia-smi --query-gpu=name --format=csv). Correct --device if it is not that."
    )
