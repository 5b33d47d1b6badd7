PSChU(	cœúgçgH=Ev(ÿ«:J”ùj€=÷6
