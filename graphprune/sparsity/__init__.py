"""Unstructured and patterned sparsity: masks that hold during training, schedules, lottery tickets, small files."""

from .channels import Channels
from .encoding import DamagedError
from .files import load, save
from .gradients import gradient
from .lottery import LotteryTicket, Round, lottery_ticket
from .magnitudes import magnitude
from .masks import make_permanent, masks, set_masks
from .overview import LayerSparsity, SparsityReport, report
from .patterns import blocks, n_m
from .reconstruction import reconstruct
from .scheduler import Scheduler
from .schedules import Schedule, schedule
from .semi_structured import semi_structured, semi_structured_support
from .statistics import match_statistics

__all__ = [
    "Channels",
    "DamagedError",
    "LayerSparsity",
    "LotteryTicket",
    "Round",
    "Schedule",
    "Scheduler",
    "SparsityReport",
    "blocks",
    "gradient",
    "load",
    "lottery_ticket",
    "magnitude",
    "make_permanent",
    "masks",
    "match_statistics",
    "n_m",
    "reconstruct",
    "report",
    "save",
    "schedule",
    "semi_structured",
    "semi_structured_support",
    "set_masks",
]
