"""Effective ranks of kernels, and the rules that choose every layer's rank."""

from decef.ranks.budget import Budget
from decef.ranks.candidate import Candidate, Rule, Totals
from decef.ranks.effective import DEFINITIONS, effective_rank
from decef.ranks.latency import Latency
from decef.ranks.rules import EffectiveRank, Energy, Fixed, PerLayer, Share, as_rule

__all__ = [
    "DEFINITIONS",
    "Budget",
    "Candidate",
    "EffectiveRank",
    "Energy",
    "Fixed",
    "Latency",
    "PerLayer",
    "Rule",
    "Share",
    "Totals",
    "as_rule",
    "effective_rank",
]
