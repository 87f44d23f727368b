"""How a training ends before its last step: who asks for it, where all ranks stop, and what is saved."""
