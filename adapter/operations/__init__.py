"""Operations: health, metrics and commands, on a port and a Unix socket."""
