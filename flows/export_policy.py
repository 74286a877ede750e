"""Exports a policy: a folder with weights, everything acting takes, and an example that drives an environment.

lram export-policy RUN OUT
python OUT/example.py dmcontrol/cartpole-swingup
export_trained_policy(ExportPolicySettings(checkpoint=Path("RUN"), out=Path("OUT")))
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from lram.train.export import EXAMPLE, ExportPolicySettings, export_policy

__all__ = ["ExportPolicySettings", "export_trained_policy", "main"]


@flow(name="export-policy")
def export_trained_policy(settings: ExportPolicySettings) -> Path:
    """Exports a policy.

    Returns:
        Its folder.
    """
    return export_policy(settings)


def main(settings: ExportPolicySettings) -> int:
    """Runs the flow and says where the policy is, and how to try it."""
    folder = export_trained_policy(settings)
    print(f"try it: python {folder / EXAMPLE}")
    print(folder)
    return 0
