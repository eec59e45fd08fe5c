"""What a run will take, before it starts: memory, network, time and cost.

architecture (the model without weights) -> measure (its costs, operation by operation)
    -> estimate (what they mean on a GPU, in a cluster) -> planner (the sizes that are asked for) -> report

zero_memory says what DeepSpeed keeps and sends; dry_run plans from the real inputs, which the rest does without.
"""
