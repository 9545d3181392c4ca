"""Program scheduling: who goes first where programs meet (see `policies`), and what is known of them (`table`)."""

from .policies import NAMES, POLICIES, Policy, make_policy
from .table import Entry, ProgramTable, Turn, tenant

__all__ = ["NAMES", "POLICIES", "Entry", "Policy", "ProgramTable", "Turn", "make_policy", "tenant"]
