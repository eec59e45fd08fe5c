"""Teacher scores for distillation: their tables, how trained models write them (estimate), how models compare."""
