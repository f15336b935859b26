"""The parts that all remote backends share."""
