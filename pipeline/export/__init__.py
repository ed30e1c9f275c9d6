"""Trained SAEs in the formats of other libraries, and theirs in ours."""

from pipeline.export.facts import read_metrics
from pipeline.export.formats import FORMATS
from pipeline.export.hub import check_repo, push_export
from pipeline.export.importing import import_saelens
from pipeline.export.run import ExportPlan, plan_export, run_export
from pipeline.export.saelens import load_saelens

__all__ = [
    "FORMATS",
    "ExportPlan",
    "check_repo",
    "import_saelens",
    "load_saelens",
    "plan_export",
    "push_export",
    "read_metrics",
    "run_export",
]
