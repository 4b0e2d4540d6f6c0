from klflow_ext.cli.help import write

write()
