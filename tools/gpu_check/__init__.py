"""One command that checks and measures this project on a GPU (`python -m tools.gpu_check`).

parts (what there is to run) -> runner (a process for each) -> rows (one for each case, written as it ends) -> page
"""
