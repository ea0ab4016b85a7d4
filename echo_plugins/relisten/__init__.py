"""The idea itself: segments, the turn step, transcripts, prompts. Imports the standard library and numpy only."""
