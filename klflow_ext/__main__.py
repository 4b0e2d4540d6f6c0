from klflow_ext.cli import main

main()
