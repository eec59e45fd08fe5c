"""Memory, network traffic, time and cost of a run, before it starts.

architecture (the model without weights) -> measure (its costs, operation by operation)
    -> estimate (one optimizer step on a cluster: step_memory, traffic, time) -> planner (all cluster sizes) -> report

zero_memory: memory and transfers of DeepSpeed's ZeRO stages. dry_run: sizes from the real inputs, without measurements.
"""
