"""PEFT adapters in (reading, checking, composing) and out (export, merging)."""
