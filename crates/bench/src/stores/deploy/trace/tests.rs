use super::*;

const LOG: &str = "\
2020-08-06 02:07:23.080415 ListExports id=1 readonly=0 tls=0 ...
2020-08-06 02:07:23.080712 connection=1 Connect export=\"\" tls=0 size=0x400 write=1
2020-08-06 02:07:23.080900 connection=1 Extents id=1 offset=0x0 count=0x400 req_one=1 ...
2020-08-06 02:07:23.080901 connection=1 ...Extents id=1 extents=[] return=0
2020-08-06 02:07:23.080907 connection=1 Read id=2 offset=0x0 count=0x200 ...
2020-08-06 02:07:23.080908 connection=1 Write id=3 offset=0x1000 count=0x1000 fua=0 ...
2020-08-06 02:07:23.080927 connection=1 ...Write id=3 return=0
2020-08-06 02:07:23.080930 connection=1 Flush id=4 ...
2020-08-06 02:07:23.080931 connection=1 ...Read id=2 return=0
2020-08-06 02:07:23.080932 connection=1 ...Flush id=4 return=0
2020-08-06 02:07:23.081255 connection=1 Disconnect transactions=1
";

#[test]
fn a_log_becomes_steps_in_its_order() {
    let trace = Trace::parse(LOG).unwrap();
    let expected = [
        Step::Ask(Ask::Read(ByteRange::at(0, 0x200))),
        Step::Ask(Ask::Write(ByteRange::at(0x1000, 0x1000))),
        Step::Await(1),
        Step::Ask(Ask::Flush),
        Step::Await(0),
        Step::Await(2),
    ];
    assert_eq!(trace.steps, expected);
    assert_eq!((trace.requests(), trace.bytes_read(), trace.bytes_written()), (3, 0x200, 0x1000));
}

#[test]
fn a_log_that_is_empty_or_tells_of_errors_is_refused() {
    assert!(Trace::parse("").is_err());
    assert!(Trace::parse(&LOG.replace("...Write id=3 return=0", "...Write id=3 return=-1")).is_err());
    assert!(Trace::parse(&LOG.replace("offset=0x1000", "offset=x")).is_err());
}

#[test]
fn bytes_are_counted_once() {
    let ranges = [ByteRange::new(0, 10), ByteRange::new(5, 20), ByteRange::new(30, 40), ByteRange::new(6, 8)];
    assert_eq!(union(ranges.into_iter()), 30);
}

#[test]
fn a_whole_disk_is_read_in_pieces_few_at_once() {
    let trace = Trace::whole(&[ByteRange::new(0, 25), ByteRange::new(100, 140)], 10);
    assert_eq!((trace.requests(), trace.bytes_read()), (7, 65));
    let (mut asked, mut answered, mut most) = (0, 0, 0);
    for step in trace.steps {
        match step {
            Step::Ask(_) => asked += 1,
            Step::Await(number) => {
                assert!(number < asked);
                answered = answered.max(number + 1);
            }
        }
        most = most.max(asked - answered);
    }
    assert_eq!(most, 4);
}
