"""Audit of a Mixture of Experts: what its routing does on given data, judged against thresholds.

`Subject` is a model with data, `audit` measures and judges it, `write_page` and `Audit.to_json` show the result.
`subject_of_task` and `subject_of_transformers` make subjects of what is trained here and of released models.
"""

from routerzoo.audit.compression import Compression, compress
from routerzoo.audit.result import Audit, LayerAudit, audit, record_experts
from routerzoo.audit.subject import Losses, Subject, subject_of_task
from routerzoo.audit.thresholds import Finding, Thresholds

__all__ = [
    "Audit",
    "Compression",
    "Finding",
    "LayerAudit",
    "Losses",
    "Subject",
    "Thresholds",
    "audit",
    "compress",
    "record_experts",
    "subject_of_task",
]
