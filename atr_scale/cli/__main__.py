from atr_scale.cli import main

main()
