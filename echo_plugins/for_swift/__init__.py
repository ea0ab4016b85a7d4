"""Adapters for ms-swift: the check of stage 1's rows, and the templates that read their clips."""
