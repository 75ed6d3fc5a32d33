"""Simulators that are external programs, in any language.

Here is how such a program is run, fed, read and ended. Which rows are simulated, and what becomes
of a row whose run failed, is in ``simulation/``.
"""

from sbi_dist.program.process import ProgramCrashed, ProgramError, ProgramFailed, ProgramTimeout
from sbi_dist.program.program import Program

__all__ = ["Program", "ProgramCrashed", "ProgramError", "ProgramFailed", "ProgramTimeout"]
