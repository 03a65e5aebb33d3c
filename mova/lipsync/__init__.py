"""Do the lips follow the voice: mouth landmarks against sound without weights, or SyncNet with them (spec/lipsync.md)."""
