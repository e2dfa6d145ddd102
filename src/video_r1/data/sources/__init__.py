"""Where files are: folders, addresses, tar archives, cells of tables; and their copies."""
