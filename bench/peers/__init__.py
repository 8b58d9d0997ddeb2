"""What a careful user of public packages would write today: the yardstick for the step and for the data pipeline."""
