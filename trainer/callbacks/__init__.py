"""Callbacks: everything about a run that is not the step itself, one file a concern."""

from __future__ import annotations
