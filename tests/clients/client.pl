# Asks for sessions as Perl programs do. Arguments: host, port.
use strict;
use warnings;
use HTTP::Tiny;
use IO::Socket::INET;

my ($host, $port) = @ARGV;
my $answer = HTTP::Tiny->new->post("http://$host:$port/v1/sessions");
print "HTTP::Tiny $answer->{status}\n";

my $raw = IO::Socket::INET->new("$host:$port") or die;
print $raw "POST /v1/sessions HTTP/1.0\r\n\r\n";
$raw->flush;
$raw->shutdown(1);
print "half-closed ", (split ' ', <$raw>)[1], "\n";
