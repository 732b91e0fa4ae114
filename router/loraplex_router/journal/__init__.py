"""The journal: what streams have generated so far, kept in a store so that any router that has it can continue them."""
