"""Averages of weights: running averages and SWAG over whole and sharded models, schedules, BatchNorm recalibration."""
