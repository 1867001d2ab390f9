"""Plots and pictures that one lesson each draws."""
