"""Engines that compute from codes: vLLM."""
