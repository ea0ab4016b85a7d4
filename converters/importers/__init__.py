"""One small file a source format. Each is a command: python -m converters.importers.NAME IN OUT.jsonl --audio-root DIR."""
