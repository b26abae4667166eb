"""Pure torch functions: no modules, no state, no I/O."""
